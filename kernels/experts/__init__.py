"""The grouped linear of mixture-of-experts layers: rows sorted by expert, one weight for each."""
