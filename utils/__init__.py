"""Parts of the application round the package: training, validation, timing, files."""
