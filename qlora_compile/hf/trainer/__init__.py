"""Training by TRL and transformers: data, chat templates, objectives."""
