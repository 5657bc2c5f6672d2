"""What carries frames between coordinator and agent: Flower's client app, the agent's door, the tunnel out."""
