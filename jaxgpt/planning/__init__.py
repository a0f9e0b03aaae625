"""How much memory a step needs on a card, and how long it takes there."""
