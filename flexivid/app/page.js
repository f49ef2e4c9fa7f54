// All clips have the same length: they start together, and again once all have ended. A click pauses all.
(() => {
  let shown = "", playing = true, turn = 0;
  const videos = () => [...document.querySelectorAll("video.screen")];
  async function restart(all) {
    const mine = ++turn;
    await Promise.all(all.map(video => video.readyState >= 3 ? null :
      new Promise(ready => { video.oncanplay = video.onerror = ready; })));
    if (mine !== turn) return;  // another clip has come
    for (const video of all) { video.currentTime = 0; if (playing) video.play().catch(() => {}); }
  }
  // The page is changed by its server, which tells nobody here.
  setInterval(() => {
    const all = videos(), now = all.map(video => video.src).join();
    if (now === shown && !(playing && all.length && all.every(video => video.ended))) return;
    shown = now;
    restart(all);
  }, 100);
  document.addEventListener("click", event => {
    if (!event.target.matches?.("video.screen")) return;
    playing = !playing;
    for (const video of videos()) playing ? video.play().catch(() => {}) : video.pause();
  });
})();
