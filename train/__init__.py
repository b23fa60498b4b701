"""Training: recipes, what runs them, and what they leave behind. Imports models and state."""
