"""What several processes must agree on: today they are refused."""
