"""The process that holds a site's data: what it answers, what its guard lets pass, how it is served."""
