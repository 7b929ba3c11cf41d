"""What reaches into private parts of the frameworks: a file for each of them, so that an upgrade breaks one file."""
