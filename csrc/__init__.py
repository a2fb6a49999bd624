"""Native sources, compiled at first use; a package only so that wheels carry them."""
