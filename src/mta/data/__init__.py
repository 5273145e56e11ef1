"""People, their histories, tasks, and the files they are read from."""
