"use strict";
// Shows the one report that the page above hands over. This frame has no origin, no token, and may ask for nothing.
addEventListener("message", (event) => {
  if (event.source !== parent || typeof event.data?.html !== "string") return;
  document.open();
  document.write(event.data.html);
  document.close();
}, { once: true });
