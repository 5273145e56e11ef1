"""Reports: tables, figures, HTML, and console output from stored results."""
