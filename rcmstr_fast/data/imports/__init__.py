"""Other people's data sets: which pictures and labels they have, and which part (train, val, test) each belongs to."""
