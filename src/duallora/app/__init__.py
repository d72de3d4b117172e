"""A saved model as a web page (extra ``app``): teach, try, look; `duallora.commands.app` starts it."""
