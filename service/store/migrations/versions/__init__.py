"""The migrations: one module for each schema revision, in order.

Expand and contract: replicas of this version and of the previous one run side by side on the newest schema. So a
migration only adds: tables, indexes, and columns that are nullable or have a server default. It leaves everything that
the previous version's statements use as it is.

1. Expand, in release N: add what is new. Write it in new rows. Fill it in existing rows, and in those that a replica of
   the previous version still writes, in bounded batches while the service runs (`service.store.labelling`). Statements
   must work on rows that are not filled yet.
2. Contract, in release N+1 or later, when no replica of the release before N can run any more: drop the old columns, or
   require the new ones.

`tests/store/test_side_by_side.py` runs the statements of both versions on the expanded schema. Those of the previous
version are recorded in `tests/store/releases`; record those of a release with `python -m tests.store.statements`.

A downgrade (`episodic migrate --to REVISION`) drops what the migration added, and refuses to lose data that cannot be
computed again. It needs all replicas of the newer version to be stopped.
"""
