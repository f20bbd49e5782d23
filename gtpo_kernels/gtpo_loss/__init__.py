"""The clipped policy loss from logits, or straight from hidden states, with its gradients computed in the forward pass."""
