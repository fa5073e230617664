"""The words of the simulator's titles and tags: topics with words of their own, and what goes before and after."""

TOPICS = {
    "cooking": ("Sourdough", "Noodle", "Pepper", "Skillet", "Harvest"),
    "hiking": ("Ridge", "Summit", "Trailhead", "Canyon", "Alpine"),
    "jazz": ("Midnight", "Saxophone", "Bluenote", "Swing", "Cellar"),
    "chess": ("Gambit", "Endgame", "Rook", "Sicilian", "Tempo"),
    "gardens": ("Orchid", "Compost", "Hedgerow", "Greenhouse", "Moss"),
    "cycling": ("Velodrome", "Gravel", "Peloton", "Sprint", "Cobble"),
    "space": ("Orbit", "Nebula", "Lander", "Eclipse", "Perihelion"),
    "knitting": ("Cable", "Merino", "Purl", "Lace", "Skein"),
    "films": ("Matinee", "Director", "Reel", "Noir", "Premiere"),
    "surfing": ("Reef", "Swell", "Longboard", "Offshore", "Tide"),
    "robots": ("Servo", "Actuator", "Gripper", "Lidar", "Firmware"),
    "history": ("Empire", "Archive", "Voyage", "Treaty", "Dynasty"),
    "coffee": ("Espresso", "Roast", "Crema", "Pour-over", "Arabica"),
    "dogs": ("Shepherd", "Puppy", "Terrier", "Fetch", "Kennel"),
    "finance": ("Ledger", "Dividend", "Index", "Bond", "Budget"),
    "yoga": ("Lotus", "Breath", "Sunrise", "Balance", "Stillness"),
}
FORMS = ("Guide", "Stories", "Challenge", "Basics", "Diary", "Review", "Live", "Secrets", "Weekly", "Masterclass")
ADJECTIVES = ("Quiet", "Bold", "Hidden", "Classic", "Modern", "Tiny", "Grand", "Honest", "Slow", "Bright")
