"""Kill tests: every stage dies at every durable write and at random times, and loses nothing."""
