"""What a person gives, as the arrays that the components take: prompts, image files, image patches."""
