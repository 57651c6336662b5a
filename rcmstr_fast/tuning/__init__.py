"""First contact with a machine: what may be chosen (`choices`), how it is timed (`engine`), what is kept (`record`)."""
