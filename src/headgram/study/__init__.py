"""What a study asks for: options, manifest, lock, and the plan that follows from them."""
