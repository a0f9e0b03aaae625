"""What a step needs on a card, and how long it takes there."""
