"""The clipped policy loss from logits, or straight from hidden states; its forward pass computes the gradients."""
