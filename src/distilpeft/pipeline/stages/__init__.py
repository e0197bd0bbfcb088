"""One module per verb. Stages never import each other: they meet through artifacts."""
