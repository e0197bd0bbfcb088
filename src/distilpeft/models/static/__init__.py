"""Static students: a vector for each token, their weighted mean, and a head."""
