"""How good the model of a round is: losses, generated answers, and benchmark tasks."""
