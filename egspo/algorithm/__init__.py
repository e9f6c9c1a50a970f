"""EGSPO: selected steps, their states, advantages, loss and update."""
