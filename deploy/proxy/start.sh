#!/bin/sh
# Starts nginx with the addresses of the replicas, and has it read them again when they change: it would look their name
# up once, at its start, and take all addresses of a name for one place of the hash.
set -eu

replicas() {
    getent ahostsv4 service | while read -r address _; do
        echo "server $address:8000 max_fails=1 fail_timeout=5s;"
    done | sort -u
}

watch() {
    while sleep 2; do
        replicas >/tmp/replicas.new || continue
        if [ -s /tmp/replicas.new ] && [ "$(cat /tmp/replicas.new)" != "$(cat /tmp/replicas.conf)" ]; then
            mv /tmp/replicas.new /tmp/replicas.conf
            nginx -e stderr -s reload
        fi
    done
}

replicas >/tmp/replicas.conf
watch &
exec nginx -e stderr -g 'daemon off;'
