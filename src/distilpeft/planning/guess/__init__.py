"""What `distilpeft init` takes where nothing is given: the kind of task, its columns, and the device."""
