"""What a GPU can do, without downloading anything: random weights of known shapes, and clocks."""
