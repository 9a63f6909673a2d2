"""What other exporters make of the same weights. Nothing of the project depends on them."""
