"""What `rcmstr plot` draws."""
