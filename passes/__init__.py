"""Graph to graph, in numbered phases. Pure: no files, no environment, no clock."""
