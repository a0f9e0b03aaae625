"""What the machine is: facts about cards, and which devices JAX may use."""
