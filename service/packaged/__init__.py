"""Data files of the package: policies (model weights) and profiles (presets for POST /episode)."""
