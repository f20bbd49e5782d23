"""Log-probability, entropy and log-sum-exp of every row, from logits or straight from hidden states."""
