"""Where the time of training steps went: from the ranks' events to tables and pictures."""
