"""The configuration that ships with kvpipe: YAML files only."""
