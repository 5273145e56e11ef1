"""People, their histories, tasks, and readers of their files."""
