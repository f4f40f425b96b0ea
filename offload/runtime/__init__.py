"""Runs a schedule under a model: lanes that move, the rendezvous with the model's forward, what was measured."""
