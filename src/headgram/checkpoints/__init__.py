"""Where the bytes are: sources, file formats, and the query and key weights of a layer."""
