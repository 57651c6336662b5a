"""Parts that methods share, each with the fields of its configuration."""
