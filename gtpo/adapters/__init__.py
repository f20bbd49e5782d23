"""Adapters to other trainers: one file each.  `layouts` needs none of them, and every other adapter stands on it."""
