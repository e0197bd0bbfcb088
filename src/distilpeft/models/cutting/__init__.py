"""Cut a student out of a teacher: some of its layers, and the strongest units of what is left."""
