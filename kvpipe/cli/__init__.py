"""The command line: one file a verb, and the map from verb to file."""
