"""The front end process: requests are admitted here, before the engine sees them."""
