"""Preparing user input: text and image files become the arrays that the components take."""
