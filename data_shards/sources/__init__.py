"""Source files as rows; one reader per format."""
