"""Data that ships with the package: policies (model weights) and profiles (presets for POST /episode)."""
