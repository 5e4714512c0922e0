"""Sources of proposals beside predictors: they look at the model, a batch and its residuals, not at products."""
