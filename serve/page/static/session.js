// What every page shares: times of this place, words for screen readers, and the end of a session.

const short = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const long = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });

export class SessionEnded extends Error {}

export function clock(time = new Date()) {
  return short.format(time);
}

export function localiseTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const time = new Date(element.dateTime);
    element.title = element.dateTime;
    element.textContent = time.toDateString() === new Date().toDateString() ? clock(time) : long.format(time);
  }
}

export function announce(words) {
  document.getElementById("announcement").textContent = words;
}

// Ask the service with this session's cookie. Once the token is not good any more, nothing of a patient stays on the screen.
export async function ask(url, options = {}) {
  const answer = await fetch(url, { cache: "no-store", credentials: "same-origin", ...options });
  if (answer.status === 401) {
    endSession();
    throw new SessionEnded();
  }
  return answer;
}

let ended = false;

function endSession() {
  if (ended) return;
  ended = true;
  sessionStorage.clear();
  const notice = document.getElementById("session-ended").content.cloneNode(true);
  document.getElementById("announcement").textContent = "";
  document.getElementById("sign-out")?.remove();
  const main = document.getElementById("main");
  main.replaceChildren(notice);
  main.querySelector("a").focus();
}

// Run a question again and again while somebody can see the page; `question` settles before the next one begins.
export function repeat(question, seconds) {
  let timer;
  const run = async () => {
    clearTimeout(timer);
    if (document.hidden || ended) return;
    await question();
    clearTimeout(timer);
    timer = setTimeout(run, seconds * 1000);
  };
  document.addEventListener("visibilitychange", run);
  timer = setTimeout(run, seconds * 1000);
  return run;
}

document.getElementById("sign-out")?.addEventListener("submit", () => sessionStorage.clear());
