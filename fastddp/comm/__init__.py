"""Process groups and transports: who the ranks are, how they meet and exchange; no models."""
