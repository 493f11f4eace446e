"""What flows between the stages: block layouts, image sources, token shards."""
